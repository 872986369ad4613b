"""Reports: tables and charts, as HTML, Markdown, JSON, CSV and images."""
