"""What lies on the disk: manifests, readers of every layout, the bf16 export. Nothing here imports torch."""
