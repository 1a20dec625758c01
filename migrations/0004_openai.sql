-- What OpenAI's clients need beyond a chat. An answer that its client did not ask to store still has to survive while it
-- runs and for a while after, for whoever comes back for it: it lies in a hidden conversation, which no list and no
-- search shows, and which a sweep deletes once nobody can be waiting for it any more.

ALTER TABLE conversation ADD COLUMN hidden INTEGER NOT NULL DEFAULT 0 CHECK (hidden IN (0, 1));

DROP INDEX conversation_by_activity;
CREATE INDEX conversation_by_activity ON conversation (owner, updated_at_ms DESC, id DESC) WHERE hidden = 0;
CREATE INDEX conversation_to_sweep ON conversation (updated_at_ms) WHERE hidden = 1;

ALTER TABLE message ADD COLUMN system TEXT;          -- the system prompt of this answer alone; NULL: the conversation's
ALTER TABLE message ADD COLUMN response_json TEXT    -- of /v1/responses: what a response repeats of its request
    CHECK (response_json IS NULL OR json_valid(response_json));
