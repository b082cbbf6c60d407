"""Results as a table for the console, as JSON, and as a page that one opens in a browser."""

from aib_tf.evaluation.report.console import table, write_json
from aib_tf.evaluation.report.page import RunResults, write
from aib_tf.evaluation.report.pictures import Gallery, GalleryMaps, gallery

__all__ = ["Gallery", "GalleryMaps", "RunResults", "gallery", "table", "write", "write_json"]
