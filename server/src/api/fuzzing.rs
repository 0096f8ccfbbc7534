//! Entry points for fuzzing: what requests go through before the ledger sees them, with arbitrary bytes as requests.

use chrono::DateTime;
use jobledger_proto::v1 as pb;
use prost::Message;
use tonic::{Code, Status};

use super::{caller::Caller, request, status::ApiError};
use crate::domain::{clock::Time, id::OrgId};

/// The time by which it is checked when tokens expire.
const OF_TOKENS: Time = DateTime::UNIX_EPOCH;

/// Decodes and validates a message as its call does. The first byte chooses the call. A refusal must be INVALID_ARGUMENT.
pub fn request(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    let caller = Caller::anybody(OrgId::DEFAULT);
    match kind % 29 {
        0 => read(bytes, |message| request::create(message, &caller)),
        1 => read(bytes, |message: pb::BatchCreateJobsRequest| {
            request::items("requests", message.requests.len())?;
            message.requests.into_iter().map(|message| request::create(message, &caller)).collect::<Result<Vec<_>, _>>()
        }),
        2 => read(bytes, request::update),
        3 => read(bytes, |message: pb::BatchUpdateJobStatusRequest| {
            request::items("updates", message.updates.len())?;
            message.updates.into_iter().map(request::update).collect::<Result<Vec<_>, _>>()
        }),
        4 => read(bytes, request::claim),
        5 => read(bytes, request::heartbeat),
        6 => read(bytes, request::cancel),
        7 => read(bytes, request::retry),
        8 => read(bytes, request::list),
        9 => read(bytes, request::subscribe),
        10 => read(bytes, request::statistics),
        11 => read(bytes, request::edit),
        12 => read(bytes, request::get),
        13 => read(bytes, |message| request::explain(&message)),
        14 => read(bytes, request::list_types),
        15 => read(bytes, request::get_type),
        16 => read(bytes, request::update_type),
        17 => read(bytes, request::delete_type),
        18 => read(bytes, request::pause_type),
        19 => read(bytes, request::resume_type),
        20 => read(bytes, request::start_bulk),
        21 => read(bytes, request::list_bulk),
        22 => read(bytes, |message: pb::GetBulkOperationRequest| request::operation(&message.operation_id)),
        23 => read(bytes, request::list_workers),
        24 => read(bytes, request::list_orgs),
        25 => read(bytes, request::list_tokens),
        26 => read(bytes, |message| request::revoke_token(&message)),
        27 => read(bytes, |message| request::create_token(message, OF_TOKENS)),
        _ => read(bytes, request::erase),
    }
}

/// Asserts that a message and its re-encoded form are validated alike, and that the error message of a refusal is short.
fn read<M: Message + Default, T>(bytes: &[u8], check: impl Fn(M) -> Result<T, ApiError>) {
    let Ok(message) = M::decode(bytes) else { return };
    let again = M::decode(&*message.encode_to_vec()).expect("what was read can be written and read");
    let [first, second] = [message, again].map(|message| check(message).err().map(Status::from));
    assert_eq!(first.as_ref().map(Status::code), second.as_ref().map(Status::code));
    if let Some(refused) = first {
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert!(refused.message().len() < 8 << 10, "{} bytes of message", refused.message().len());
    }
}

/// Parses a page token. One that is accepted must have the only form that the server writes.
pub fn page_token(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    // `{list}` stands for the fingerprint of this list, so that parsing gets further than the fingerprint.
    let request = pb::ListJobsRequest::default();
    let fingerprint = request::list(request.clone()).expect("a list of everything").token(0, 0);
    let fingerprint = fingerprint.rsplit('.').next().unwrap_or_default();
    let page_token = text.replace("{list}", fingerprint);
    if let Ok(listing) = request::list(pb::ListJobsRequest { page_token: page_token.clone(), ..request })
        && !page_token.is_empty()
    {
        let as_of_seq = listing.as_of_seq.expect("a page that is not the first has one");
        assert_eq!(listing.token(listing.query.after, as_of_seq), page_token);
    }
}
