//! Everything that can be called, with who may call it and which bounds apply: the only place that knows a call by its path.

use http::Method;

use crate::domain::access::{Role, Roles};

/// Who may call something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Allowed {
    /// Anybody. Such a call tells nothing about any org and costs next to nothing.
    Anybody,
    /// Every caller with a valid credential.
    AnyRole,
    /// Callers with one of these roles, for one org.
    Roles(Roles),
    /// Operators, about no single org.
    Operators,
}

const READERS: Allowed = Allowed::Roles(Roles::of(&[
    Role::Producer,
    Role::Worker,
    Role::Observer,
    Role::Auditor,
    Role::Admin,
    Role::Operator,
]));
const PRODUCERS: Allowed = Allowed::Roles(Roles::of(&[Role::Producer, Role::Admin, Role::Operator]));
const WORKERS: Allowed = Allowed::Roles(Roles::of(&[Role::Worker, Role::Admin, Role::Operator]));
const ADMINS: Allowed = Allowed::Roles(Roles::of(&[Role::Admin, Role::Operator]));
const OBSERVERS: Allowed = Allowed::Roles(Roles::of(&[Role::Observer, Role::Auditor, Role::Admin, Role::Operator]));

/// Which bounds of its org a call counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum CallClass {
    /// Any other call.
    Other,
    /// CreateJob, BatchCreateJobs and UpdateJob: their requests have payloads.
    Create,
    /// ClaimJobs, which may wait.
    Claim,
    /// Heartbeat: it keeps running jobs alive.
    Heartbeat,
    /// UpdateJobStatus.
    Report,
    /// BatchUpdateJobStatus, by which workers send the outcomes of their jobs.
    Reports,
    /// CancelJob: it may end a running job, and comes from producers.
    Cancel,
    /// StreamJobEvents.
    Stream,
}

impl CallClass {
    /// How many rates an org has.
    pub(super) const RATES: usize = 6;

    /// The rate of its org that a call counts against, below [`CallClass::RATES`].
    pub(super) const fn rate(self) -> usize {
        match self {
            Self::Other | Self::Create | Self::Stream => 0,
            Self::Claim => 1,
            Self::Heartbeat => 2,
            Self::Report => 3,
            Self::Reports => 4,
            Self::Cancel => 5,
        }
    }

    /// True of calls whose requests have payloads or results.
    pub(super) const fn is_large(self) -> bool {
        match self {
            Self::Create | Self::Report | Self::Reports => true,
            Self::Other | Self::Claim | Self::Heartbeat | Self::Cancel | Self::Stream => false,
        }
    }

    /// True of calls that have a quarter more room than creates, as their commands have in the lanes (`Command::is_vital`).
    pub(super) const fn has_reserve(self) -> bool {
        match self {
            Self::Heartbeat | Self::Report | Self::Reports | Self::Cancel => true,
            Self::Other | Self::Create | Self::Claim | Self::Stream => false,
        }
    }
}

/// What is called: a request extension that the outermost layer sets. A request without it calls nothing that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rpc {
    CreateJob,
    BatchCreateJobs,
    GetJob,
    ListJobs,
    ExplainJob,
    UpdateJobStatus,
    BatchUpdateJobStatus,
    ClaimJobs,
    Heartbeat,
    CancelJob,
    RetryJob,
    UpdateJob,
    EraseJob,
    StreamJobEvents,
    GetStatistics,
    ListJobTypes,
    GetJobType,
    UpdateJobType,
    DeleteJobType,
    PauseJobType,
    ResumeJobType,
    StartBulkOperation,
    GetBulkOperation,
    ListBulkOperations,
    StopBulkOperation,
    ListWorkers,
    GetServerInfo,
    ListOrgs,
    CreateToken,
    ListTokens,
    RevokeToken,
    HealthCheck,
    HealthWatch,
    /// ServerReflectionInfo of either version: a dialogue, whose caller sends more once it was answered.
    Reflection,
    /// `/healthz` and `/readyz`.
    Probe,
    /// `POST /jobs` of the old REST calls.
    LegacyCreate,
    /// `POST /jobs/ID/status` of the old REST calls.
    LegacyReport,
    /// `GET /jobs/ID` of the old REST calls.
    LegacyRead,
}

/// All that can be called by gRPC.
const GRPC: [(&str, Rpc); 35] = [
    ("/jobledger.v1.JobService/CreateJob", Rpc::CreateJob),
    ("/jobledger.v1.JobService/BatchCreateJobs", Rpc::BatchCreateJobs),
    ("/jobledger.v1.JobService/GetJob", Rpc::GetJob),
    ("/jobledger.v1.JobService/ListJobs", Rpc::ListJobs),
    ("/jobledger.v1.JobService/ExplainJob", Rpc::ExplainJob),
    ("/jobledger.v1.JobService/UpdateJobStatus", Rpc::UpdateJobStatus),
    ("/jobledger.v1.JobService/BatchUpdateJobStatus", Rpc::BatchUpdateJobStatus),
    ("/jobledger.v1.JobService/ClaimJobs", Rpc::ClaimJobs),
    ("/jobledger.v1.JobService/Heartbeat", Rpc::Heartbeat),
    ("/jobledger.v1.JobService/CancelJob", Rpc::CancelJob),
    ("/jobledger.v1.JobService/RetryJob", Rpc::RetryJob),
    ("/jobledger.v1.JobService/UpdateJob", Rpc::UpdateJob),
    ("/jobledger.v1.JobService/EraseJob", Rpc::EraseJob),
    ("/jobledger.v1.JobService/StreamJobEvents", Rpc::StreamJobEvents),
    ("/jobledger.v1.JobService/GetStatistics", Rpc::GetStatistics),
    ("/jobledger.v1.JobTypeService/ListJobTypes", Rpc::ListJobTypes),
    ("/jobledger.v1.JobTypeService/GetJobType", Rpc::GetJobType),
    ("/jobledger.v1.JobTypeService/UpdateJobType", Rpc::UpdateJobType),
    ("/jobledger.v1.JobTypeService/DeleteJobType", Rpc::DeleteJobType),
    ("/jobledger.v1.JobTypeService/PauseJobType", Rpc::PauseJobType),
    ("/jobledger.v1.JobTypeService/ResumeJobType", Rpc::ResumeJobType),
    ("/jobledger.v1.BulkOperationService/StartBulkOperation", Rpc::StartBulkOperation),
    ("/jobledger.v1.BulkOperationService/GetBulkOperation", Rpc::GetBulkOperation),
    ("/jobledger.v1.BulkOperationService/ListBulkOperations", Rpc::ListBulkOperations),
    ("/jobledger.v1.BulkOperationService/StopBulkOperation", Rpc::StopBulkOperation),
    ("/jobledger.v1.WorkerService/ListWorkers", Rpc::ListWorkers),
    ("/jobledger.v1.ServerService/GetServerInfo", Rpc::GetServerInfo),
    ("/jobledger.v1.ServerService/ListOrgs", Rpc::ListOrgs),
    ("/jobledger.v1.ServerService/CreateToken", Rpc::CreateToken),
    ("/jobledger.v1.ServerService/ListTokens", Rpc::ListTokens),
    ("/jobledger.v1.ServerService/RevokeToken", Rpc::RevokeToken),
    ("/grpc.health.v1.Health/Check", Rpc::HealthCheck),
    ("/grpc.health.v1.Health/Watch", Rpc::HealthWatch),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Rpc::Reflection),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Rpc::Reflection),
];

impl Rpc {
    /// What a request calls, or `None` if there is no such call.
    pub(super) fn of(method: &Method, path: &str) -> Option<Self> {
        if let Some((_, rpc)) = GRPC.iter().find(|(call, _)| *call == path) {
            return Some(*rpc);
        }
        match path {
            "/healthz" | "/readyz" => Some(Self::Probe),
            path if path.starts_with("/jobs") => Some(match *method {
                Method::POST if path.trim_end_matches('/').ends_with("/status") => Self::LegacyReport,
                Method::POST => Self::LegacyCreate,
                _ => Self::LegacyRead,
            }),
            _ => None,
        }
    }

    /// Who may call it.
    pub(super) const fn allowed(self) -> Allowed {
        match self {
            Self::CreateJob
            | Self::BatchCreateJobs
            | Self::CancelJob
            | Self::RetryJob
            | Self::UpdateJob
            | Self::LegacyCreate => PRODUCERS,
            Self::UpdateJobStatus
            | Self::BatchUpdateJobStatus
            | Self::ClaimJobs
            | Self::Heartbeat
            | Self::LegacyReport => WORKERS,
            // A stream of a whole org is for observers only. The service checks that, since it depends on the request.
            Self::GetJob
            | Self::ListJobs
            | Self::ExplainJob
            | Self::StreamJobEvents
            | Self::GetServerInfo
            | Self::LegacyRead => READERS,
            Self::ListOrgs => Allowed::Operators,
            Self::GetStatistics
            | Self::ListWorkers
            | Self::ListJobTypes
            | Self::GetJobType
            | Self::GetBulkOperation
            | Self::ListBulkOperations => OBSERVERS,
            Self::EraseJob
            | Self::UpdateJobType
            | Self::DeleteJobType
            | Self::PauseJobType
            | Self::ResumeJobType
            | Self::StartBulkOperation
            | Self::StopBulkOperation
            | Self::CreateToken
            | Self::ListTokens
            | Self::RevokeToken => ADMINS,
            Self::HealthWatch | Self::Reflection => Allowed::AnyRole,
            Self::HealthCheck | Self::Probe => Allowed::Anybody,
        }
    }

    /// True of calls that may take longer than their credential is valid. All others take about as long as a commit.
    pub(super) const fn is_long(self) -> bool {
        match self {
            Self::ClaimJobs | Self::StreamJobEvents | Self::HealthWatch | Self::Reflection => true,
            Self::CreateJob
            | Self::BatchCreateJobs
            | Self::GetJob
            | Self::ListJobs
            | Self::ExplainJob
            | Self::UpdateJobStatus
            | Self::BatchUpdateJobStatus
            | Self::Heartbeat
            | Self::CancelJob
            | Self::RetryJob
            | Self::UpdateJob
            | Self::EraseJob
            | Self::GetStatistics
            | Self::ListJobTypes
            | Self::GetJobType
            | Self::UpdateJobType
            | Self::DeleteJobType
            | Self::PauseJobType
            | Self::ResumeJobType
            | Self::StartBulkOperation
            | Self::GetBulkOperation
            | Self::ListBulkOperations
            | Self::StopBulkOperation
            | Self::ListWorkers
            | Self::GetServerInfo
            | Self::ListOrgs
            | Self::CreateToken
            | Self::ListTokens
            | Self::RevokeToken
            | Self::HealthCheck
            | Self::Probe
            | Self::LegacyCreate
            | Self::LegacyReport
            | Self::LegacyRead => false,
        }
    }

    /// Which bounds of its org it counts against.
    pub(super) const fn class(self) -> CallClass {
        match self {
            Self::CreateJob | Self::BatchCreateJobs | Self::UpdateJob => CallClass::Create,
            Self::UpdateJobStatus | Self::LegacyReport => CallClass::Report,
            Self::BatchUpdateJobStatus => CallClass::Reports,
            Self::ClaimJobs => CallClass::Claim,
            Self::Heartbeat => CallClass::Heartbeat,
            // Revoking has the reserve, too: it may be what ends a flood.
            Self::CancelJob | Self::RevokeToken => CallClass::Cancel,
            Self::StreamJobEvents => CallClass::Stream,
            Self::GetJob
            | Self::ListJobs
            | Self::ExplainJob
            | Self::RetryJob
            | Self::EraseJob
            | Self::GetStatistics
            | Self::ListJobTypes
            | Self::GetJobType
            | Self::UpdateJobType
            | Self::DeleteJobType
            | Self::PauseJobType
            | Self::ResumeJobType
            | Self::StartBulkOperation
            | Self::GetBulkOperation
            | Self::ListBulkOperations
            | Self::StopBulkOperation
            | Self::ListWorkers
            | Self::GetServerInfo
            | Self::ListOrgs
            | Self::CreateToken
            | Self::ListTokens
            | Self::HealthCheck
            | Self::HealthWatch
            | Self::Reflection
            | Self::Probe
            | Self::LegacyCreate
            | Self::LegacyRead => CallClass::Other,
        }
    }

    /// True of the calls of JobService.
    pub(super) const fn is_of_job_service(self) -> bool {
        match self {
            Self::CreateJob
            | Self::BatchCreateJobs
            | Self::GetJob
            | Self::ListJobs
            | Self::ExplainJob
            | Self::UpdateJobStatus
            | Self::BatchUpdateJobStatus
            | Self::ClaimJobs
            | Self::Heartbeat
            | Self::CancelJob
            | Self::RetryJob
            | Self::UpdateJob
            | Self::EraseJob
            | Self::StreamJobEvents
            | Self::GetStatistics => true,
            Self::ListJobTypes
            | Self::GetJobType
            | Self::UpdateJobType
            | Self::DeleteJobType
            | Self::PauseJobType
            | Self::ResumeJobType
            | Self::StartBulkOperation
            | Self::GetBulkOperation
            | Self::ListBulkOperations
            | Self::StopBulkOperation
            | Self::ListWorkers
            | Self::GetServerInfo
            | Self::ListOrgs
            | Self::CreateToken
            | Self::ListTokens
            | Self::RevokeToken
            | Self::HealthCheck
            | Self::HealthWatch
            | Self::Reflection
            | Self::Probe
            | Self::LegacyCreate
            | Self::LegacyReport
            | Self::LegacyRead => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use jobledger_proto::FILE_DESCRIPTOR_SET;
    use prost::Message as _;
    use prost_types::FileDescriptorSet;
    use tonic::{Code, Status};

    use super::{
        super::status::{ApiError, plain},
        *,
    };

    #[test]
    fn every_call_of_the_contract_has_its_rights() {
        let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
        let mut calls = 0;
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let rpc = Rpc::of(&Method::POST, &path).unwrap_or_else(|| panic!("{path} is no call"));
                    assert_eq!(rpc.is_of_job_service(), service.name() == "JobService", "{path}");
                    let is_about_an_org = matches!(rpc.allowed(), Allowed::Roles(_));
                    assert_eq!(is_about_an_org, method.name() != "ListOrgs", "{path}");
                    assert!(rpc.is_long() || !method.server_streaming(), "{path} streams");
                    calls += 1;
                }
            }
        }
        assert_eq!(calls, 31);
    }

    #[test]
    fn what_is_not_there_is_nobodys() {
        for path in ["/", "/x", "/jobledger.v1.JobService/createjob", "/jobledger.v1.JobService/", "/healthz/"] {
            assert_eq!(Rpc::of(&Method::POST, path), None, "{path}");
        }
        assert_eq!(Code::Unimplemented, Status::from(ApiError::NoSuchCall).code());
        assert_eq!(plain(ApiError::NoSuchCall).status(), StatusCode::NOT_FOUND);
    }
}
