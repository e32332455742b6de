"""Results for people: tables, pictures, charts."""
