"""Starting runs on a cluster: scripts of launch/, filled in from a cluster file, and submitted."""
