-- The versions of this release, as its migration notes them.
insert into absurd_server.migration (version, name, checksum, min_server)
values (9, '0.2.0', '7afa44059eb6236d51f8c210c269c7deead8bda9638b617042ecf6d620c8b254', 2);
insert into absurd_server.setting (name, value)
values ('origin', 'ours'), ('contract_version', '2'), ('doorbell', 'on');
