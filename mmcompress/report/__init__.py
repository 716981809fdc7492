"""The report: its data model (``schema``), and what turns it into HTML, Markdown, a table or a model card."""
