"""Making images: engines, the image pipeline and the objectives they minimise."""
