"""Every option once: its declaration, where its value comes from, its checks."""
