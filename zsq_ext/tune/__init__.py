"""Using images: fine-tuning, block reconstruction and their losses."""
