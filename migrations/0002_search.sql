-- Full text over titles, questions and answers. A message's row has its id; a conversation's title has minus the
-- conversation's. `segment` and `owner_token` are functions of the program: scripts without spaces between words are
-- split into characters, and an owner is one word, so that a search looks at that owner's rows only.

CREATE VIRTUAL TABLE message_fts USING fts5 (owner, title, text, prefix = "2 3", tokenize = "unicode61 remove_diacritics 2");

INSERT INTO message_fts (rowid, owner, title)
SELECT -id, owner_token(owner), segment(title) FROM conversation;

INSERT INTO message_fts (rowid, owner, text)
SELECT message.id, owner_token(conversation.owner), segment((
    SELECT group_concat(text, '') FROM (
        SELECT text FROM delta WHERE delta.message_id = message.id AND kind = 'text' ORDER BY delta.offset)))
FROM message JOIN conversation ON conversation.id = message.conversation_id
WHERE message.status != 'running';

-- What every message of a conversation is asked with unless its request says otherwise; temperature, max_tokens, …
ALTER TABLE conversation ADD COLUMN params_json TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(params_json));
