//! Tests with a real etcd.

mod authority;
mod connection;
mod etcd;
mod join;
mod proxy;
mod users;
