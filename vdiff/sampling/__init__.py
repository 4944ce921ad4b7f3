"""Drawing images into a folder."""
