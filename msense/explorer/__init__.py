"""Views of dictionaries and students: pages as plain dataclasses, and the local web application that shows them."""
