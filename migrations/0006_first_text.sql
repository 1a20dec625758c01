-- When the first of an answer's text came: until then the model had been thinking, or nothing had come at all.
ALTER TABLE message ADD COLUMN first_text_at_ms INTEGER;
