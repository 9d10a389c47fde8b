"""What the report draws, as data; the page, the figure files and the CSV files are three forms of it."""
