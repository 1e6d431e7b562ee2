//! Hashing in the server.
