-- Conversations are trees of messages; a message's content is its deltas in order, whatever its role.
-- Times are UTC integer milliseconds (…_at_ms); offsets and lengths count Unicode code points.

CREATE TABLE conversation (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used again, so an old link cannot show a new conversation
    owner         TEXT    NOT NULL,
    title         TEXT    NOT NULL DEFAULT '',
    system        TEXT    NOT NULL DEFAULT '',         -- the system prompt; empty: none
    created_at_ms INTEGER NOT NULL,
    updated_at_ms INTEGER NOT NULL                     -- the newest activity: what the list is sorted by
) STRICT;

CREATE INDEX conversation_by_activity ON conversation (owner, updated_at_ms DESC, id DESC);

CREATE TABLE message (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id   INTEGER NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
    parent_id         INTEGER REFERENCES message (id) ON DELETE CASCADE,   -- NULL: a first message
    role              TEXT    NOT NULL CHECK (role IN ('user', 'assistant', 'system', 'tool')),
    status            TEXT    NOT NULL CHECK (status IN ('running', 'completed', 'stopped', 'failed', 'interrupted')),
    provider          TEXT,                            -- assistant messages: who answered, or was last asked
    model             TEXT,
    params_json       TEXT    NOT NULL DEFAULT '{}' CHECK (json_valid(params_json)),
    finish_reason     TEXT    CHECK (finish_reason IN ('stop', 'length', 'tool_calls', 'content_filter')),
    error_json        TEXT    CHECK (error_json IS NULL OR json_valid(error_json)),
    usage_json        TEXT    CHECK (usage_json IS NULL OR json_valid(usage_json)),
    attempts_json     TEXT    NOT NULL DEFAULT '[]' CHECK (json_valid(attempts_json)),
    idempotency_key   TEXT,                            -- of the request that started it
    request_hash      TEXT,                            -- of that request's body: a repeat must be the same
    created_at_ms     INTEGER NOT NULL,
    first_delta_at_ms INTEGER,
    ended_at_ms       INTEGER,
    CHECK ((status = 'running') = (ended_at_ms IS NULL)),
    CHECK (status != 'failed' OR error_json IS NOT NULL)
) STRICT;

CREATE INDEX message_by_conversation ON message (conversation_id, id);
CREATE INDEX message_by_parent ON message (parent_id);
CREATE INDEX message_running ON message (id) WHERE status = 'running';
CREATE INDEX message_by_idempotency_key ON message (idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE TABLE delta (
    message_id INTEGER NOT NULL REFERENCES message (id) ON DELETE CASCADE,
    offset     INTEGER NOT NULL CHECK (offset >= 0),   -- code points of all deltas before it
    kind       TEXT    NOT NULL CHECK (kind IN ('text', 'reasoning', 'tool_call', 'image', 'signature')),
    text       TEXT    NOT NULL,
    PRIMARY KEY (message_id, offset)
) STRICT, WITHOUT ROWID;
