"""`python -m services.bootstrap`: the first rows of an installation, and stored secrets under today's key.

Running it again changes nothing.
"""

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.session import Database
from db.tables import ApiKey, Organization
from luthier.bases.catalogue import find_base_facts, load_catalogue
from luthier.core.errors import LuthierError
from luthier.core.ids import hash_api_key, is_well_formed, new_id
from luthier.core.settings import Settings
from luthier.webhooks.sealing import Sealer
from services.accounts import keys
from services.models import models
from services.webhooks.endpoints import reseal

_FIRST_PROJECT = "personal"


def ensure_first_rows(session: Session, settings: Settings) -> None:
    """Make the first organization, its project, the first admin key (where one is set), and rows of bases."""
    organization = session.scalar(select(Organization).where(Organization.slug == settings.organization))
    if organization is None:
        organization = Organization(id=new_id("organization"), slug=settings.organization)
        session.add(organization)
        session.flush()
    project = keys.ensure_project(session, organization.id, _FIRST_PROJECT)
    key = settings.bootstrap_api_key.get_secret_value()
    if key:
        if not is_well_formed(key):
            raise LuthierError("LUTHIER_BOOTSTRAP_API_KEY is no key of the form lt_…; leave it unset.")
        known = session.scalar(select(ApiKey.id).where(ApiKey.key_hash == hash_api_key(key)))
        if known is None:
            keys.insert_key(session, project, key, name="first key", is_admin=True)
    for base_id in load_catalogue(settings.models_file).bases:
        facts = find_base_facts(settings.bases_dir, base_id)
        if facts is not None:
            models.record_base(session, facts)


def main() -> None:
    """Bootstrap the database that the settings name."""
    settings = Settings()
    database = Database(settings.database_url.get_secret_value(), pool_size=1)
    sealer = Sealer(settings.secret_key.get_secret_value())
    with database.transaction() as session:
        ensure_first_rows(session, settings)
        reseal(session, sealer)
        bases = [base.id for base in models.list_bases(session)]
    structlog.get_logger().info("bootstrapped", organization=settings.organization, bases=bases)


if __name__ == "__main__":
    main()
