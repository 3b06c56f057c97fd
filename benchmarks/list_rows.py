"""A project with very many jobs, made by one statement: what `benchmarks.list_speed` reads pages of."""

from sqlalchemy import select, text

from db.session import Database
from db.tables import ApiKey, Organization
from luthier.core.ids import new_id
from luthier.core.specs import TrainingSpec
from luthier.methods import check_tuning
from services.accounts.auth import Scope
from services.files import files
from services.files.files import StoredFile

# One job a second into the past, a tenth of them without metadata. The keys of the filters: `team` has ten
# values, `run` a thousand.
_INSERT = """
INSERT INTO jobs (
  id, organization_id, project_id, created_by_key_id, created_at, status, model, base_id, spec,
  training_file_id, seed, metadata, started_at, finished_at, tidied_at, fine_tuned_model, trained_tokens,
  lease_epoch, last_event_seq
)
SELECT
  'ftjob-' || md5(number::text), :organization, :project, :key, now() - number * interval '1 second',
  (ARRAY['succeeded', 'failed', 'cancelled'])[1 + number % 3], 'base', 'base', CAST(:spec AS jsonb),
  :file, number,
  CASE WHEN number % 10 = 0 THEN NULL ELSE jsonb_build_object(
    'team', 't' || (number % 10), 'run', (number / 10 % 1000)::text, 'note', md5('note' || number)
  ) END,
  now(), now(), now(), 'ft:base:personal::' || substr(md5(number::text), 1, 8), 1000, 2, 20
FROM generate_series(1, :num_jobs) AS number
"""


def fill(database: Database, num_jobs: int) -> Scope:
    """Make the jobs of the first key's project.

    Args:
        database: migrated and bootstrapped.
        num_jobs: how many.

    Returns:
        The scope of that key.
    """
    spec = TrainingSpec(base_id="base", tuning=check_tuning({"type": "lora"}), seed=1)
    with database.transaction() as session:
        key = session.scalars(select(ApiKey)).one()
        slug = session.scalars(select(Organization.slug)).one()
        scope = Scope(key.organization_id, slug, key.project_id, key.id, is_admin=True)
        stored = StoredFile(new_id("file"), "rows.jsonl", "fine-tune", 1, 10, "0" * 64, "nowhere")
        file = files.record(session, scope, stored)
        session.execute(
            text(_INSERT),
            {
                "organization": scope.organization_id,
                "project": scope.project_id,
                "key": scope.key_id,
                "spec": spec.model_dump_json(),
                "file": file.id,
                "num_jobs": num_jobs,
            },
        )
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE jobs"))
    return scope
