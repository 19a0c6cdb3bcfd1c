mod contacts;
mod harness;
mod mesh;
mod net;
mod refusals;
mod renewal;
mod restarts;
mod retry;
mod segmentation;
mod superpackets;
mod tables;

#[test]
fn handles_may_be_shared_between_threads() {
    fn shared<T: Clone + Send + Sync + 'static>() {}
    shared::<super::Tunnel>();
}
