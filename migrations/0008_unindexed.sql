-- Texts that the search does not know yet, by the ids that they have in message_fts. They go in together, a moment after
-- they came: FTS5 makes a segment of what each transaction brings, and later merges segments, at five times the cost.
CREATE TABLE unindexed (
    id INTEGER PRIMARY KEY
) STRICT;
