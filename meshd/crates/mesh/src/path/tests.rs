use std::collections::BTreeMap;

use super::*;

#[test]
fn eligible_needs_the_same_site_and_the_same_connected_prefix() {
    let nets = |texts: &[&str]| texts.iter().map(|t| t.parse::<IpNet>().unwrap()).collect::<Vec<_>>();
    let own = nets(&["192.168.1.2/24", "fd00:1::2/64"]);
    let peer = nets(&["10.0.0.3/8", "192.168.1.3/24", "fd00:1::3/64"]);
    let link = eligible(Family::V4, Some("east"), &own, Some("east"), &peer).unwrap();
    assert_eq!(link.next_hop, "192.168.1.3".parse::<IpAddr>().unwrap());
    assert!(eligible(Family::V6, Some("east"), &own, Some("east"), &peer).is_some());
    assert!(eligible(Family::V4, Some("east"), &own, Some("west"), &peer).is_none(), "two sites");
    assert!(eligible(Family::V4, None, &own, None, &peer).is_none(), "no site: never");
    let wider = nets(&["192.168.1.3/16"]);
    assert!(eligible(Family::V4, Some("east"), &own, Some("east"), &wider).is_none(), "the ends disagree");
    assert!(eligible(Family::V4, Some("east"), &own, Some("east"), &own).is_none(), "the own address");
    let point = nets(&["192.168.1.3/32"]);
    assert!(eligible(Family::V4, Some("east"), &point, Some("east"), &point).is_none());
}

fn link() -> DirectLink {
    DirectLink { own: "192.168.1.1/24".parse().unwrap(), next_hop: "192.168.1.2".parse().unwrap() }
}

/// A peer on this node's subnet.
fn near() -> Candidates {
    let candidate = LinkCandidate { link: link(), prefixes: Vec::new(), target: None };
    Candidates {
        unusable: None,
        unproven: false,
        carrier: Carrier::Tunnel { callable: true },
        links: [(Family::V4, candidate)].into(),
    }
}

/// A peer elsewhere.
fn far() -> Candidates {
    Candidates { links: BTreeMap::new(), ..near() }
}

/// One that has been called for a minute without an answer.
const SILENT: TunnelSession = TunnelSession {
    alive: false,
    calls: 12,
    last_call: Some(std::time::Duration::from_secs(2)),
    keys: 1,
    endpoints: 2,
};

const STATES: [Option<DirectState>; 5] = [
    None,
    Some(DirectState::Direct),
    Some(DirectState::Silent),
    Some(DirectState::Tunnel(NotDirect::Unproven)),
    Some(DirectState::Tunnel(NotDirect::Failed)),
];

#[test]
fn only_a_proven_link_is_direct() {
    for candidates in [near(), far(), Candidates { carrier: Carrier::Tunnel { callable: false }, ..near() }] {
        for state in STATES {
            let path = choose(&candidates, Family::V4, state);
            let proven = !candidates.links.is_empty() && state == Some(DirectState::Direct);
            assert_eq!(path.via == Via::Link(PathKind::HostGw, link()), proven, "{candidates:?} {state:?}");
        }
    }
}

#[test]
fn an_unusable_peer_has_no_path_and_its_record_says_why() {
    let candidates = Candidates { unusable: Some("its key belongs to a".into()), ..near() };
    for state in STATES {
        let path = choose(&candidates, Family::V4, state).with_session(Some(&SILENT));
        assert_eq!((path.via, path.reach), (Via::Nowhere, Reach::Unreachable));
        assert_eq!(path.reason.to_string(), "its key belongs to a");
    }
}

#[test]
fn a_tunnel_that_does_not_answer_is_unreachable_but_still_called() {
    let path = choose(&far(), Family::V4, None).with_session(Some(&SILENT));
    assert_eq!(
        path,
        ChosenPath { via: Via::Tun(PathKind::Wireguard), reach: Reach::Unreachable, reason: Reason::NoHandshake }
    );
    assert_eq!(path.kind(), None);
    let direct = choose(&near(), Family::V4, Some(DirectState::Direct)).with_session(Some(&SILENT));
    assert_eq!(direct.kind(), Some(PathKind::HostGw), "the direct path needs no session");
}

#[test]
fn a_peer_is_silent_once_every_key_and_endpoint_was_called_for_fifteen_seconds() {
    let silent = |session: TunnelSession| session.is_silent();
    assert!(silent(SILENT));
    assert!(!silent(TunnelSession { calls: 3, endpoints: 1, ..SILENT }), "three calls may be lost");
    assert!(!silent(TunnelSession { keys: 2, calls: 7, endpoints: 1, ..SILENT }), "the next key's calls may be lost");
    assert!(!silent(TunnelSession { endpoints: 12, ..SILENT }), "not every endpoint was tried");
    assert!(!silent(TunnelSession { last_call: Some(std::time::Duration::from_secs(300)), ..SILENT }), "long ago");
    assert!(!silent(TunnelSession { calls: 0, last_call: None, ..SILENT }), "not called");
}

#[test]
fn a_session_that_answers_confirms_the_tunnel() {
    let alive = TunnelSession { alive: true, ..TunnelSession::default() };
    assert_eq!(choose(&far(), Family::V4, None).reach, Reach::Unconfirmed);
    assert_eq!(choose(&far(), Family::V4, None).with_session(Some(&alive)).reach, Reach::Confirmed);
    assert_eq!(
        choose(&far(), Family::V4, None).with_session(Some(&TunnelSession::default())).reach,
        Reach::Unconfirmed
    );
    let none = Candidates { carrier: Carrier::Tunnel { callable: false }, ..far() };
    assert_eq!(choose(&none, Family::V4, None).with_session(Some(&alive)).reason, Reason::NoEndpoint);
}

#[test]
fn with_host_gw_a_peer_is_direct_or_unreachable() {
    let on_subnet = Candidates { carrier: Carrier::Nothing, ..near() };
    let elsewhere = Candidates { carrier: Carrier::Nothing, ..far() };
    for state in STATES {
        let path = choose(&on_subnet, Family::V4, state);
        let direct = state == Some(DirectState::Direct);
        assert_eq!(path.kind(), direct.then_some(PathKind::HostGw), "{state:?}");
        assert_eq!(path.reason == Reason::Best, direct, "{state:?}");
        assert_eq!(choose(&elsewhere, Family::V4, state), ChosenPath::nowhere(Reason::NotOnSubnet));
    }
}

#[test]
fn with_vxlan_a_peer_is_direct_or_at_its_end_of_that_family() {
    let vtep = Vtep { address: "192.0.2.7".parse().unwrap(), mac: MacAddress([2, 0, 0, 0, 0, 7]) };
    let candidates = Candidates { carrier: Carrier::Vxlan([(Family::V4, vtep)].into()), ..near() };
    for state in STATES {
        let path = choose(&candidates, Family::V4, state).with_session(Some(&SILENT));
        let direct = state == Some(DirectState::Direct);
        let via = if direct { Via::Link(PathKind::HostGw, link()) } else { Via::Vtep(PathKind::Vxlan, vtep) };
        assert_eq!(path.via, via, "{state:?}");
        assert_ne!(path.reach, Reach::Unreachable, "the tunnel's silence says nothing of it: {state:?}");
        assert_eq!(choose(&candidates, Family::V6, state), ChosenPath::nowhere(Reason::NoVtep));
    }
}

#[test]
fn the_worse_family_speaks_for_the_peer() {
    let direct = choose(&near(), Family::V4, Some(DirectState::Direct));
    let lost = choose(&near(), Family::V4, Some(DirectState::Tunnel(NotDirect::Failed)));
    let silent = choose(&near(), Family::V4, Some(DirectState::Silent));
    let no_handshake = choose(&far(), Family::V4, None).with_session(Some(&SILENT));
    let both = |v4: &ChosenPath, v6: &ChosenPath| worse([(Family::V4, v4.clone()), (Family::V6, v6.clone())]);
    assert_eq!(both(&direct, &direct), (None, direct.clone()));
    assert_eq!(both(&direct, &lost), (Some(Family::V6), lost.clone()));
    assert_eq!(both(&lost, &direct), (Some(Family::V4), lost));
    assert_eq!(both(&silent, &no_handshake), (Some(Family::V4), silent), "it says more");
    assert_eq!(worse([]), (None, ChosenPath::nowhere(Reason::NoSubnet)));
}

#[test]
fn an_external_peer_is_reached_by_its_session_alone() {
    assert_eq!(ChosenPath::external(None), ChosenPath::nowhere(Reason::Refused));
    assert_eq!(ChosenPath::external(Some(&TunnelSession::default())).kind(), Some(PathKind::Wireguard));
    assert_eq!(ChosenPath::external(Some(&SILENT)).reason, Reason::NoHandshake);
}

#[test]
fn a_host_of_flannels_is_direct_without_an_echo_and_else_at_its_end() {
    let vtep = Vtep { address: "192.0.2.7".parse().unwrap(), mac: MacAddress([2, 0, 0, 0, 0, 7]) };
    let carrier = Carrier::Vxlan([(Family::V4, vtep)].into());
    let path = choose(&Candidates { unproven: true, carrier: carrier.clone(), ..near() }, Family::V4, None);
    assert_eq!((path.via, path.reach), (Via::Link(PathKind::HostGw, link()), Reach::Unconfirmed));
    let path = choose(&Candidates { unproven: true, carrier, ..far() }, Family::V4, None);
    assert_eq!((path.via, path.reach), (Via::Vtep(PathKind::Vxlan, vtep), Reach::Unconfirmed));
    assert_eq!(path.reason, Reason::Unproven);
    let elsewhere = Candidates { unproven: true, carrier: Carrier::Nothing, ..far() };
    assert_eq!(choose(&elsewhere, Family::V4, None), ChosenPath::nowhere(Reason::NotOnSubnet));
}
