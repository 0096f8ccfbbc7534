//! What has to be looked up or worked out before it is known who calls: so much at a time, by the addresses in turn. Who makes credentials up
//! must not keep the database, or the processors, from others, nor others from being looked up.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::Refusal;
use crate::{
    shares::{Most, Part, Shares, network},
    turns::{Turn, Turns},
};

/// Those that may wait.
const MAY_WAIT: usize = 4_096;
const MAY_WAIT_FOR: Duration = Duration::from_secs(5);

/// Turns by address, and places to wait for them.
pub(super) struct Gate {
    places: Arc<Shares<IpAddr>>,
    turns: Arc<Turns<IpAddr>>,
}

/// A turn, until it is dropped.
pub(super) struct Entered {
    _place: Part<IpAddr>,
    _turn: Turn<IpAddr>,
}

impl Gate {
    /// With so many at a time, and so many that may wait of one address.
    pub(super) fn new(at_a_time: usize, each: usize) -> Self {
        Self { places: Shares::new(Most { in_all: MAY_WAIT, each }), turns: Turns::new(at_a_time) }
    }

    /// Waits for a turn of somebody at this address.
    ///
    /// # Errors
    ///
    /// [`Refusal::Busy`] where too many wait, or it does not come in time.
    pub(super) async fn enter(&self, from: IpAddr) -> Result<Entered, Refusal> {
        let from = network(from);
        let _place = self.places.take(from, 1).map_err(|_| Refusal::Busy)?;
        let _turn = timeout(MAY_WAIT_FOR, self.turns.take(from)).await.map_err(|_| Refusal::Busy)?;
        Ok(Entered { _place, _turn })
    }
}
