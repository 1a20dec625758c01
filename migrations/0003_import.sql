-- An origin is who a conversation or a message is, wherever an export carries it: what the file said that it came in with.
-- NULL: it was made here, and its origin follows from its id. A second import of a file finds what it would add.

ALTER TABLE conversation ADD COLUMN origin TEXT;
ALTER TABLE message ADD COLUMN origin TEXT;

CREATE UNIQUE INDEX conversation_by_origin ON conversation (owner, origin) WHERE origin IS NOT NULL;
CREATE UNIQUE INDEX message_by_origin ON message (conversation_id, origin) WHERE origin IS NOT NULL;

-- 1: the many small rows that an answer is streamed into have been merged into few.
ALTER TABLE message ADD COLUMN merged INTEGER NOT NULL DEFAULT 0 CHECK (merged IN (0, 1));

CREATE INDEX message_unmerged ON message (ended_at_ms) WHERE merged = 0 AND role = 'assistant';
