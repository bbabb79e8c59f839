# shellcheck shell=bash
# Shared by the scripts that call gcloud: project and zone, and what its errors mean.

# shellcheck disable=SC2154 # declared by the scripts that source this file
find_place() { # sets PROJECT and ZONE from options, environment or gcloud's configuration
  need_program gcloud "see https://cloud.google.com/sdk/docs/install, then run: gcloud auth login"
  PROJECT=${opt_project:-${CLOUDSDK_CORE_PROJECT:-}} ZONE=${opt_zone:-${CLOUDSDK_COMPUTE_ZONE:-}}
  if [[ $opt_dry_run == false ]]; then
    [[ -n $PROJECT ]] || { call 60 gcloud config get-value project && PROJECT=$OUT; } || true
    [[ -n $ZONE ]] || { call 60 gcloud config get-value compute/zone && ZONE=$OUT; } || true
  fi
  [[ -n $PROJECT && $PROJECT != '(unset)' ]] || die "no project: add --project NAME, or run: gcloud config set project NAME"
  [[ -n $ZONE && $ZONE != '(unset)' ]] || die "no zone: add --zone NAME, or run: gcloud config set compute/zone NAME"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone $ZONE: should look like us-central1-a."
  # shellcheck disable=SC2034
  REGION=${ZONE%-*} PLACE=(--zone="$ZONE" --project="$PROJECT")
}

# What an error of gcloud is: absent, exists, login, permission, quota, capacity, invalid, timeout or unknown.
kind_of_error() { # its stderr
  case $1 in
    *NOT_FOUND* | *'was not found'* | *'could not be found'* | *'code: 404'* | *'code=404'*) echo absent ;;
    *ALREADY_EXISTS* | *'already exists'*) echo exists ;;
    *'gcloud auth login'* | *'active account'* | *UNAUTHENTICATED* | *'invalid_grant'*) echo login ;;
    *PERMISSION_DENIED* | *'does not have permission'* | *'Required '*' permission'* | *'HTTPError 403'*) echo permission ;;
    *'no more capacity'* | *'not enough resources'* | *STOCKOUT* | *ZONE_RESOURCE_POOL_EXHAUSTED* | *'insufficient capacity'*) echo capacity ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*) echo quota ;;
    *INVALID_ARGUMENT* | *'Invalid value'* | *'unrecognized arguments'*) echo invalid ;;
    *'no answer within'*) echo timeout ;;
    *) echo unknown ;;
  esac
}

explain() { # its stderr; prints one line that says what to run
  local last=${1##*$'\n'}
  case $(kind_of_error "$1") in
    login) echo "gcloud is not logged in; run: gcloud auth login" ;;
    permission) echo "no permission in project $PROJECT: ask its owner for the roles that launch/README.md names ($last)" ;;
    quota) echo "the quota of project $PROJECT is too small in $ZONE: ask for more at https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT, or try --spot, another zone or a smaller slice ($last)" ;;
    capacity) echo "$ZONE has no capacity now: try later, another zone, or --queued, which waits for it ($last)" ;;
    invalid) echo "gcloud refuses this: $last; see what a zone has with: gcloud compute tpus accelerator-types list $(quoted "${PLACE[@]}")" ;;
    absent) echo "it does not exist ($last)" ;;
    *) echo "${last:-gcloud gave no reason}" ;;
  esac
}

check_bucket() { # folder: refuses a bucket that cannot be used, before anything costs money
  [[ $1 == gs://* ]] || return 0
  call 60 gcloud storage buckets describe "$(bucket_of "$1")" --format="value(name)" ||
    die "the bucket of $1 cannot be used by this account ($(explain "$ERR")); for a new one run: gcloud storage buckets create $(bucket_of "$1") --location=$REGION --project=$PROJECT"
}

bucket_of() { local rest=${1#gs://}; echo "gs://${rest%%/*}"; }
