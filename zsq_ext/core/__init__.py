"""Ground floor shared by every room: input descriptions, named random streams, run folders, progress."""
