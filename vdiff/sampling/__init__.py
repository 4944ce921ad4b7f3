"""Drawing images into files: any number, cut short or not, by one process or several."""
