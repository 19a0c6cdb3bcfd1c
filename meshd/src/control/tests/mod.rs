//! Against a real etcd.

mod connection;
mod etcd;
mod join;
mod proxy;
