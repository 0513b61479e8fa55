"""Files: local and remote storage, atomic writes, arrays, and checks of files from others."""
