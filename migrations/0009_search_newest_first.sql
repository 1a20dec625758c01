-- Titles have an index of their own: a title that matches is not looked for among all texts that do. Both have minus the id
-- of what they index, so that the newest comes first in the order in which FTS5 reads fastest.
ALTER TABLE message_fts RENAME TO all_fts;

CREATE VIRTUAL TABLE message_fts USING fts5 (owner, text, prefix = "2 3", tokenize = "unicode61 remove_diacritics 2");
CREATE VIRTUAL TABLE conversation_fts USING fts5 (owner, title, prefix = "2 3", tokenize = "unicode61 remove_diacritics 2");
CREATE VIRTUAL TABLE message_term USING fts5vocab (message_fts, instance);

INSERT INTO message_fts (rowid, owner, text) SELECT -rowid, owner, text FROM all_fts WHERE rowid > 0 ORDER BY rowid DESC;
INSERT INTO conversation_fts (rowid, owner, title) SELECT rowid, owner, title FROM all_fts WHERE rowid < 0 ORDER BY rowid;

DROP TABLE all_fts;

-- Which conversations have a running answer: one look for each, however many messages it has.
DROP INDEX message_running;
CREATE INDEX message_running ON message (conversation_id) WHERE status = 'running';
