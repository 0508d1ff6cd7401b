"""The web page: static files that show what the JSON API tells. Nothing is loaded from elsewhere."""
