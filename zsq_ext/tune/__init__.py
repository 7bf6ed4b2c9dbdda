"""Using images: fine-tuning, its losses and the published ideas around it."""
