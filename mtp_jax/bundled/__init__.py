"""Small models that come with the package; `bundled:NAME` names the folder NAME here."""
