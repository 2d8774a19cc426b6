"""What lies on the disk: manifests, readers of every checkpoint layout, and the bf16 export. Nothing here imports torch."""
