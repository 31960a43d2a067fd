"""From a run folder to what people read: the facts as JSON, Markdown, plots."""
