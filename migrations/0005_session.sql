-- Who is signed in on the page. Neither the cookie nor the token is stored: only what they hash to.

CREATE TABLE session (
    cookie_hash   TEXT    PRIMARY KEY,
    owner         TEXT    NOT NULL,
    token_hash    TEXT    NOT NULL,   -- of cookie and owner's token together: another token ends the session
    expires_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
