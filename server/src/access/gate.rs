//! Bounds the work for credentials that are not verified yet (token look-ups, signatures). The work goes in turns by
//! address, so made-up credentials don't keep others from the database or the processors, or delay their checks.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::time::timeout;

use super::Refusal;
use crate::{
    shares::{Most, Part, Shares, network},
    turns::{Turn, Turns},
};

/// Callers that may wait for a turn, from all addresses, and for how long.
const MAY_WAIT: usize = 4_096;
const MAY_WAIT_FOR: Duration = Duration::from_secs(5);

/// Turns by address, and the slots of those who wait for them.
pub(super) struct Gate {
    places: Arc<Shares<IpAddr>>,
    turns: Arc<Turns<IpAddr>>,
}

/// A turn. Dropping it ends it.
pub(super) struct Entered {
    _place: Part<IpAddr>,
    _turn: Turn<IpAddr>,
}

impl Gate {
    /// A gate with `at_a_time` turns, for which at most `each` callers of one address may wait.
    pub(super) fn new(at_a_time: usize, each: usize) -> Self {
        Self { places: Shares::new(Most { in_all: MAY_WAIT, each }), turns: Turns::new(at_a_time) }
    }

    /// Waits for a turn of this address.
    ///
    /// # Errors
    ///
    /// [`Refusal::Busy`] if too many callers wait, or no turn comes within 5 s.
    pub(super) async fn enter(&self, from: IpAddr) -> Result<Entered, Refusal> {
        let from = network(from);
        let _place = self.places.take(from, 1).map_err(|_| Refusal::Busy)?;
        let _turn = timeout(MAY_WAIT_FOR, self.turns.take(from)).await.map_err(|_| Refusal::Busy)?;
        Ok(Entered { _place, _turn })
    }
}
