-- The versions of this release, as its migration notes them.
insert into absurd_server.migration (version, name, checksum, min_server)
values (9, '0.2.0', '7c5491c50788b67319da9c0dfd575b77553f617670844cfd57c320edceeb7a48', 2);
insert into absurd_server.setting (name, value)
values ('origin', 'ours'), ('contract_version', '2'), ('doorbell', 'on');
