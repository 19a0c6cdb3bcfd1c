use super::*;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 7]);
const STRANGER: MacAddress = MacAddress([2, 0, 0, 0, 0, 9]);

/// What the peer and the kernel do at a moment.
#[derive(Debug, Clone, Copy)]
struct Life {
    /// Probes get their echo.
    echoes: bool,
    /// A call in the tunnel is answered.
    tunnel: bool,
    neighbour: Option<MacAddress>,
}

const WELL: Life = Life { echoes: true, tunnel: true, neighbour: Some(MAC) };
/// The network drops what goes direct.
const BLOCKED: Life = Life { echoes: false, ..WELL };
/// The daemon is down, the machine is not.
const DOWN: Life = Life { echoes: false, tunnel: false, neighbour: Some(MAC) };
const GONE: Life = Life { neighbour: None, ..DOWN };
/// No tunnel, but a direct path.
const ONLY_DIRECT: Life = Life { tunnel: false, ..WELL };

/// A path under a virtual clock. Each step jumps to the path's next deadline.
#[derive(Clone)]
struct Clock {
    now: Instant,
    path: DirectPath,
    nonce: u128,
    heard: Option<Instant>,
    calls: u32,
    changes: Vec<DirectState>,
}

impl Clock {
    fn new() -> Self {
        let now = Instant::now();
        Self { now, path: DirectPath::new(now), nonce: 0, heard: None, calls: 0, changes: Vec::new() }
    }

    /// Goes to the path's next deadline; the probe that is sent then, if one is.
    fn step(&mut self, life: Life) -> Option<Probe> {
        self.now = self.now.max(self.path.deadline());
        self.nonce += 1;
        let around = Surroundings { heard_in_tunnel: self.heard, neighbour: life.neighbour };
        let probe = self.path.poll(self.now, around, self.nonce);
        self.note();
        if self.path.wants_tunnel(self.now, self.heard) {
            self.calls += 1;
            if life.tunnel {
                self.heard = Some(self.now);
            }
        }
        probe
    }

    fn note(&mut self) {
        if self.changes.last() != Some(&self.path.state()) {
            self.changes.push(self.path.state());
        }
    }

    /// Runs for `span`; probes are answered at once, where they are.
    fn run(&mut self, span: Duration, life: Life) -> &mut Self {
        let end = self.now + span;
        self.changes = vec![self.path.state()];
        while self.path.deadline() <= end {
            let probe = self.step(life).filter(|_| life.echoes);
            if let Some(probe) = probe {
                assert!(self.path.echoed(self.now, probe.nonce, life.neighbour));
                self.note();
            }
        }
        self.now = end;
        self
    }

    fn state(&self) -> DirectState {
        self.path.state()
    }
}

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const FAILED: DirectState = DirectState::Tunnel(NotDirect::Failed);

#[test]
fn the_first_echo_makes_it_direct() {
    let mut clock = Clock::new();
    assert_eq!(clock.state(), DirectState::Tunnel(NotDirect::Unproven));
    clock.run(s(0), WELL);
    assert_eq!(clock.state(), DirectState::Direct);
}

#[test]
fn three_losses_lead_to_the_tunnel_within_ten_seconds_when_the_peer_answers_there() {
    let mut clock = Clock::new();
    clock.run(s(60), WELL).run(s(10), BLOCKED);
    assert_eq!(clock.state(), FAILED);
}

#[test]
fn two_losses_change_nothing() {
    let mut clock = Clock::new();
    clock.run(s(60), WELL);
    for _ in 0..5 {
        let mut lost = 0;
        while lost < 2 {
            lost += u32::from(clock.step(BLOCKED).is_some());
        }
        let probe = clock.step(WELL).expect("follows a loss at once");
        assert!(clock.path.echoed(clock.now, probe.nonce, Some(MAC)));
        assert_eq!(clock.state(), DirectState::Direct);
    }
}

#[test]
fn an_echo_that_comes_late_counts() {
    let mut clock = Clock::new();
    clock.run(s(60), WELL);
    let late = std::iter::repeat_with(|| clock.step(BLOCKED)).flatten().next().unwrap();
    let next = clock.step(BLOCKED).expect("the first one has timed out");
    assert!(clock.path.echoed(clock.now, late.nonce, Some(MAC)));
    assert!(!clock.path.echoed(clock.now, late.nonce, Some(MAC)), "once");
    assert!(clock.path.awaits(next.nonce), "the one under way is still awaited");
}

#[test]
fn a_path_that_failed_proves_itself_for_thirty_seconds() {
    let mut clock = Clock::new();
    clock.run(s(60), WELL).run(s(10), BLOCKED).run(s(29), WELL);
    assert_eq!(clock.state(), FAILED);
    clock.run(s(10), WELL);
    assert_eq!(clock.state(), DirectState::Direct);
}

#[test]
fn one_loss_while_proving_starts_the_thirty_seconds_again() {
    let mut clock = Clock::new();
    clock.run(s(60), WELL).run(s(10), BLOCKED).run(s(20), WELL).run(s(4), BLOCKED);
    clock.run(s(20), WELL);
    assert_eq!(clock.state(), FAILED);
}

#[test]
fn a_peer_that_answers_nowhere_stays_direct_while_its_neighbour_entry_holds() {
    let mut clock = Clock::new();
    clock.run(s(60), ONLY_DIRECT).run(s(280), DOWN);
    assert_eq!(clock.state(), DirectState::Direct);
    clock.run(s(30), DOWN);
    assert_eq!(clock.state(), DirectState::Silent, "at most five minutes");
}

#[test]
fn a_session_from_before_is_no_sign_of_life() {
    let mut clock = Clock::new();
    clock.run(s(60), WELL);
    clock.heard = Some(clock.now);
    clock.run(s(60), DOWN);
    assert_eq!(clock.changes, [DirectState::Direct]);
}

#[test]
fn a_restarted_peer_does_not_make_the_path_flap() {
    let mut clock = Clock::new();
    // Its daemon is away for a minute; then the tunnel answers a moment before the prober does.
    clock.run(s(60), WELL).run(s(60), DOWN).run(s(3), BLOCKED);
    assert_eq!(clock.changes, [DirectState::Direct]);
    clock.run(s(60), WELL);
    assert_eq!(clock.changes, [DirectState::Direct]);
}

#[test]
fn a_peer_that_comes_back_behind_a_network_that_drops_goes_to_the_tunnel() {
    let mut clock = Clock::new();
    clock.run(s(60), WELL).run(s(60), DOWN).run(s(20), BLOCKED);
    assert_eq!(clock.state(), FAILED);
}

#[test]
fn a_stranger_with_the_address_is_not_kept() {
    let mut clock = Clock::new();
    clock.run(s(60), ONLY_DIRECT).run(s(10), Life { neighbour: Some(STRANGER), ..DOWN });
    assert_eq!(clock.state(), DirectState::Silent);
}

#[test]
fn silence_ends_with_the_first_answer_by_either_path() {
    let mut clock = Clock::new();
    clock.run(s(60), ONLY_DIRECT).run(s(20), GONE);
    assert_eq!(clock.state(), DirectState::Silent);
    let mut other = clock.clone();
    clock.run(s(8), BLOCKED);
    assert_eq!(clock.state(), FAILED);
    other.run(s(4), ONLY_DIRECT);
    assert_eq!(other.state(), DirectState::Direct);
}

#[test]
fn a_peer_that_was_never_there_becomes_silent() {
    let mut clock = Clock::new();
    clock.run(s(60), GONE);
    assert_eq!(clock.state(), DirectState::Silent);
}

#[test]
fn a_blocked_path_stays_in_the_tunnel_and_calls_there_seldom() {
    let mut clock = Clock::new();
    clock.run(s(20), BLOCKED);
    assert_eq!(clock.state(), DirectState::Tunnel(NotDirect::Unproven));
    clock.calls = 0;
    clock.run(s(600), BLOCKED);
    assert_eq!(clock.state(), DirectState::Tunnel(NotDirect::Unproven));
    assert!(clock.calls <= 24, "{} calls in ten minutes", clock.calls);
}

#[test]
fn a_path_at_rest_makes_no_calls() {
    let mut clock = Clock::new();
    clock.run(s(600), WELL);
    assert_eq!(clock.calls, 0);
}

#[test]
fn an_echo_of_another_nonce_proves_nothing() {
    let mut clock = Clock::new();
    let probe = clock.step(WELL).expect("probed at once");
    assert!(!clock.path.echoed(clock.now, probe.nonce + 1, Some(MAC)));
    assert_eq!(clock.state(), DirectState::Tunnel(NotDirect::Unproven));
    assert!(clock.path.echoed(clock.now, probe.nonce, Some(MAC)));
    assert!(!clock.path.echoed(clock.now, probe.nonce, Some(MAC)), "an echo counts once");
}

#[test]
fn a_restarted_daemon_keeps_a_path_whose_neighbour_is_known() {
    let now = Instant::now();
    assert_eq!(DirectPath::resumed(now, Some(MAC)).state(), DirectState::Direct);
    assert_eq!(DirectPath::resumed(now, None).state(), DirectState::Tunnel(NotDirect::Unproven));
}
