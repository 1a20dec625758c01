-- A flush appends one row to the journal: what came for many messages lies together, where each one's own rows would touch
-- a page of their own. Once they are worth it, at the latest with the message's end, its deltas become rows of its own.
-- Until then, what the journal has beyond a running message's rows is its content too.
CREATE TABLE journal (
    id          INTEGER PRIMARY KEY, -- numbered anew from each start on, which begins with an empty journal
    pieces_json TEXT NOT NULL        -- {"message_id": [[offset, kind, text], …], …}
) STRICT;

-- The lengths of the events that a row's text was published in, as a JSON array; NULL: it was one, or nobody needs to know.
ALTER TABLE delta ADD COLUMN cuts_json TEXT;
