#!/bin/sh
# Makes the files that docker-compose.yml takes its secrets from: ./make-secrets.sh FOLDER [NAME...]
# FOLDER must not exist yet. NAMEs are further names or addresses the TLS certificate is for. Bring a certificate of
# your own by replacing ca_certificate, tls_certificate and tls_key afterwards.
# ./make-secrets.sh --renew FOLDER [NAME...] makes tls_key and tls_certificate anew, signed by the ca.key in FOLDER.
set -eu
renew=
if [ "${1:-}" = --renew ]; then
    renew=yes
    shift
fi
folder=${1:?usage: make-secrets.sh [--renew] FOLDER [NAME...]}
shift
umask 077
if [ -z "$renew" ]; then
    mkdir "$folder"
elif [ ! -f "$folder/ca.key" ]; then
    printf '%s holds no ca.key; bring it back, it signs the new certificate\n' "$folder" >&2
    exit 1
fi
cd "$folder"

if [ -z "$renew" ]; then
    password=$(openssl rand -hex 32)
    printf '%s' "$password" > postgres_password
    printf '[seqr]\nhost=postgres\nport=5432\nuser=seqr\npassword=%s\n' "$password" > pg_service
    openssl rand -out superexec_secret 48
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=seqr CA" \
        -addext basicConstraints=critical,CA:TRUE,pathlen:0 -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout ca.key -out ca_certificate 2> /dev/null
fi

names=DNS:nginx,DNS:superlink,DNS:coordinator,DNS:gateway,DNS:localhost,IP:127.0.0.1
for name in "$@"; do
    case $name in
        *[!0-9.]*) names=$names,DNS:$name ;;
        *) names=$names,IP:$name ;;
    esac
done
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=nginx" \
    -keyout tls_key.new -out tls.csr 2> /dev/null
printf 'subjectAltName=%s\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\nauthorityKeyIdentifier=keyid\n' "$names" > tls.ext
openssl x509 -req -in tls.csr -CA ca_certificate -CAkey ca.key -CAcreateserial -days 397 -extfile tls.ext \
    -out tls_certificate.new 2> /dev/null
mv -f tls_key.new tls_key
mv -f tls_certificate.new tls_certificate
rm tls.csr tls.ext
rm -f ca_certificate.srl ca.srl

# Containers read these as users of their own; the folder keeps everybody else on this machine out.
chmod 0444 postgres_password pg_service superexec_secret ca_certificate tls_certificate tls_key
printf 'secrets are in %s; keep ca.key elsewhere, it is needed only to make the next certificate\n' "$folder"
