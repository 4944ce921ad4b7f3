"""Models in the browser: a static page that draws there, and a server that draws on this machine."""
