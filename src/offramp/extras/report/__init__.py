"""An HTML page made from Results of `offramp eval`: `page` fills a template with `figures` of the `curves` in them."""
