//! `jobledger.v1.JobTypeService`: a few lines for each RPC.

use std::collections::BTreeMap;

use jobledger_proto::v1::{self as pb, job_type_service_server::JobTypeService};
use tonic::{Request, Response, Status, async_trait};

use super::{
    caller::Caller,
    convert, request,
    statistics::{age, counts},
    status::ApiError,
};
use crate::{
    domain::{
        clock::Time,
        job_type::{ALL_TYPES, OrgSettings, TypeCommand, TypeSettings},
        status::JobStatus,
    },
    ledger::{Ledger, LedgerError, StatisticsQuery, TypeReply, TypeStatistics},
};

pub(crate) struct JobTypes {
    ledger: Ledger,
}

impl JobTypes {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }

    async fn change(&self, caller: Caller, command: TypeCommand) -> Result<TypeReply, ApiError> {
        Ok(self.ledger.set_type(caller.by, command).await?)
    }
}

#[async_trait]
impl JobTypeService for JobTypes {
    async fn list_job_types(
        &self,
        request: Request<pb::ListJobTypesRequest>,
    ) -> Result<Response<pb::ListJobTypesResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let (after, limit) = request::list_types(request.into_inner())?;
        let found = self.ledger.statistics(caller.org(), &StatisticsQuery::of(&[])).await.map_err(ApiError::from)?;
        let all = Types { as_of: found.as_of, settings: &found.settings };
        let mut names: BTreeMap<&str, Option<&TypeStatistics>> = found
            .types
            .iter()
            .filter(|of_type| of_type.exists())
            .map(|of_type| (&*of_type.job_type, Some(of_type)))
            .collect();
        for name in found.settings.types.keys().filter(|name| ***name != *ALL_TYPES) {
            names.entry(name).or_default();
        }
        let mut left = names.into_iter().filter(|(name, _)| **name > *after).peekable();
        let job_types: Vec<_> = left.by_ref().take(limit).map(|(name, of_type)| all.one(name, of_type)).collect();
        let has_more = left.peek().is_some();
        let next_page_token =
            job_types.last().filter(|_| has_more).map(|last| request::token_after(&last.name)).unwrap_or_default();
        let of_all = found.settings.types.get(ALL_TYPES);
        Ok(Response::new(pb::ListJobTypesResponse {
            job_types,
            next_page_token,
            pause_of_all: of_all.and_then(|all| all.pause.as_ref()).map(convert::pause),
            etag_of_all: of_all.map_or_else(|| TypeSettings::default().etag(), TypeSettings::etag),
            as_of_seq: found.as_of_seq,
        }))
    }

    async fn get_job_type(
        &self,
        request: Request<pb::GetJobTypeRequest>,
    ) -> Result<Response<pb::GetJobTypeResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let name = request::get_type(request.into_inner())?;
        let query = StatisticsQuery::of(std::slice::from_ref(&name));
        let found = self.ledger.statistics(caller.org(), &query).await.map_err(ApiError::from)?;
        let of_type = found.types.iter().find(|of_type| of_type.job_type == name && of_type.exists());
        if of_type.is_none() && !found.settings.types.contains_key(&*name) {
            return Err(ApiError::from(LedgerError::TypeNotFound { job_type: name }).into());
        }
        let all = Types { as_of: found.as_of, settings: &found.settings };
        let of_all = found.settings.types.get(ALL_TYPES);
        Ok(Response::new(pb::GetJobTypeResponse {
            job_type: Some(all.one(&name, of_type)),
            pause_of_all: of_all.and_then(|all| all.pause.as_ref()).map(convert::pause),
        }))
    }

    async fn update_job_type(
        &self,
        request: Request<pb::UpdateJobTypeRequest>,
    ) -> Result<Response<pb::UpdateJobTypeResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let TypeReply { settings, as_of_seq } =
            self.change(caller, request::update_type(request.into_inner())?).await?;
        let (etag, settings) = (settings.etag(), Some(convert::type_settings(&settings)));
        Ok(Response::new(pb::UpdateJobTypeResponse { settings, etag, as_of_seq }))
    }

    async fn delete_job_type(
        &self,
        request: Request<pb::DeleteJobTypeRequest>,
    ) -> Result<Response<pb::DeleteJobTypeResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let TypeReply { as_of_seq, .. } = self.change(caller, request::delete_type(request.into_inner())?).await?;
        Ok(Response::new(pb::DeleteJobTypeResponse { as_of_seq }))
    }

    async fn pause_job_type(
        &self,
        request: Request<pb::PauseJobTypeRequest>,
    ) -> Result<Response<pb::PauseJobTypeResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let TypeReply { settings, as_of_seq } = self.change(caller, request::pause_type(request.into_inner())?).await?;
        let (etag, pause) = (settings.etag(), settings.pause.as_ref().map(convert::pause));
        Ok(Response::new(pb::PauseJobTypeResponse { pause, etag, as_of_seq }))
    }

    async fn resume_job_type(
        &self,
        request: Request<pb::ResumeJobTypeRequest>,
    ) -> Result<Response<pb::ResumeJobTypeResponse>, Status> {
        let caller = Caller::of(request.extensions())?;
        let TypeReply { settings, as_of_seq } =
            self.change(caller, request::resume_type(request.into_inner())?).await?;
        Ok(Response::new(pb::ResumeJobTypeResponse { etag: settings.etag(), as_of_seq }))
    }
}

/// What the types of an answer have in common.
struct Types<'a> {
    as_of: Time,
    settings: &'a OrgSettings,
}

impl Types<'_> {
    fn one(&self, name: &str, of_type: Option<&TypeStatistics>) -> pb::JobType {
        let none = TypeSettings::default();
        let settings = self.settings.types.get(name).unwrap_or(&none);
        let scheduled = of_type.map_or(0, |of_type| of_type.scheduled);
        let queued = of_type.map_or(0, |of_type| of_type.counts.get(JobStatus::Queued));
        pb::JobType {
            name: name.to_owned(),
            settings: Some(convert::type_settings(settings)),
            pause: settings.pause.as_ref().map(convert::pause),
            counts: Some(of_type.map(|of_type| counts(&of_type.counts)).unwrap_or_default()),
            claimable: queued - scheduled,
            scheduled,
            oldest_queued_age: of_type.and_then(|of_type| age(of_type.oldest_ready_at, self.as_of)),
            etag: settings.etag(),
        }
    }
}
