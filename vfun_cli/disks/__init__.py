"""What file systems lack: shares, buckets and Windows drives have no locks, no permissions or no flushing."""
