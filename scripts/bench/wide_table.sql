-- Documents of 33 KB.
CREATE TABLE wide (
    id    bigint PRIMARY KEY,
    title text NOT NULL,
    body  bytea NOT NULL
);
