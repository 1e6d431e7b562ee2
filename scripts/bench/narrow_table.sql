-- About 240 bytes a record as COPY sends it; the five columns after the key are its content.
CREATE TABLE narrow (
    id         bigint PRIMARY KEY,
    customer   bigint NOT NULL,
    created_at timestamptz NOT NULL,
    amount     numeric(12,2) NOT NULL,
    status     text NOT NULL,
    note       text NOT NULL
);
