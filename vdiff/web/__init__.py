"""Web pages of models: a static page that runs them in the browser, and a server that runs them on this machine."""
