"""What a run leaves on disk, and how it comes back; a first reading can skip this folder."""
