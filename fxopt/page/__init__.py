"""The interactive page: one HTML file with the story of a graph, which opens without a network."""

from fxopt.page.data import page_data
from fxopt.page.write import page_text, write_page

__all__ = ["page_data", "page_text", "write_page"]
