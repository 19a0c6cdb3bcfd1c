//! `meshd-etcd`, see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_etcd::main()
}
