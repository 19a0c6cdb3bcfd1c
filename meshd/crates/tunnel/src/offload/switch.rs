//! The state of each kernel offload, and the reason if it is off.

use std::sync::atomic::{AtomicU8, Ordering};

/// The operator's setting of an offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OffloadSetting {
    /// Use it where the kernel has it, until the kernel refuses it.
    #[default]
    Auto,
    /// Do without it.
    Off,
}

/// The operator's setting of each offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OffloadSettings {
    /// Many datagrams to one peer leave in one send (`UDP_SEGMENT`).
    pub udp_gso: OffloadSetting,
    /// Many datagrams of one peer come in one receive (`UDP_GRO`).
    pub udp_gro: OffloadSetting,
    /// The TUN device gives out and takes super-packets and unfinished checksums (`TUNSETOFFLOAD`).
    pub tun_offload: OffloadSetting,
}

/// The state of an offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum OffloadState {
    /// In use.
    On,
    /// Off, as it was set.
    SetOff,
    /// Off: this kernel does not have it.
    Missing,
    /// Off: the kernel refused an offload that it had announced.
    Refused,
}

impl OffloadState {
    const ALL: [Self; 4] = [Self::On, Self::SetOff, Self::Missing, Self::Refused];

    /// The stable snake_case name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::SetOff => "set_off",
            Self::Missing => "missing",
            Self::Refused => "refused",
        }
    }
}

/// The state of each offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffloadStatus {
    /// See [`OffloadSettings::udp_gso`].
    pub udp_gso: OffloadState,
    /// See [`OffloadSettings::udp_gro`].
    pub udp_gro: OffloadState,
    /// See [`OffloadSettings::tun_offload`]; of TCP.
    pub tun_tcp: OffloadState,
    /// The same of UDP, which kernels have since 6.2.
    pub tun_udp: OffloadState,
}

impl OffloadStatus {
    /// Each offload with its state, by its stable name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, OffloadState)> {
        let all = [
            ("udp_gso", self.udp_gso),
            ("udp_gro", self.udp_gro),
            ("tun_tcp", self.tun_tcp),
            ("tun_udp", self.tun_udp),
        ];
        all.into_iter()
    }

    /// Offloads that the kernel refused at run time.
    pub fn refused(&self) -> impl Iterator<Item = &'static str> {
        self.iter().filter(|(_, state)| *state == OffloadState::Refused).map(|(name, _)| name)
    }
}

/// The state of one offload, read by the threads that use it.
#[derive(Debug)]
pub(in super::super) struct Switch {
    name: &'static str,
    state: AtomicU8,
}

impl Switch {
    pub(in super::super) fn new(name: &'static str, setting: OffloadSetting) -> Self {
        let state = match setting {
            OffloadSetting::Auto => OffloadState::On,
            OffloadSetting::Off => OffloadState::SetOff,
        };
        Self { name, state: AtomicU8::new(state as u8) }
    }

    pub(in super::super) fn is_on(&self) -> bool {
        self.state.load(Ordering::Relaxed) == OffloadState::On as u8
    }

    pub(in super::super) fn state(&self) -> OffloadState {
        OffloadState::ALL[usize::from(self.state.load(Ordering::Relaxed)) % OffloadState::ALL.len()]
    }

    /// Switches it off, as the kernel does not have it.
    pub(in super::super) fn missing(&self) {
        if self.turn_off(OffloadState::Missing) {
            tracing::info!(offload = self.name, "offload not supported by the kernel; disabled");
        }
    }

    /// Switches it off, as the kernel refused it with `errno`. Said once.
    pub(in super::super) fn refused(&self, errno: i32) {
        if self.turn_off(OffloadState::Refused) {
            tracing::warn!(offload = self.name, errno, "offload refused by the kernel; disabled");
        }
    }

    fn turn_off(&self, state: OffloadState) -> bool {
        let on = OffloadState::On as u8;
        self.state.compare_exchange(on, state as u8, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// The switches of one tunnel.
#[derive(Debug)]
pub(in super::super) struct Switches {
    pub(in super::super) udp_gso: Switch,
    pub(in super::super) udp_gro: Switch,
    pub(in super::super) tun_tcp: Switch,
    pub(in super::super) tun_udp: Switch,
}

impl Switches {
    pub(in super::super) fn new(settings: &OffloadSettings) -> Self {
        Self {
            udp_gso: Switch::new("udp_gso", settings.udp_gso),
            udp_gro: Switch::new("udp_gro", settings.udp_gro),
            tun_tcp: Switch::new("tun_tcp", settings.tun_offload),
            tun_udp: Switch::new("tun_udp", settings.tun_offload),
        }
    }

    pub(in super::super) fn status(&self) -> OffloadStatus {
        OffloadStatus {
            udp_gso: self.udp_gso.state(),
            udp_gro: self.udp_gro.state(),
            tun_tcp: self.tun_tcp.state(),
            tun_udp: self.tun_udp.state(),
        }
    }
}
